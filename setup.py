"""Packaging: `pip install -e .` gives the packages neuclip, training and evaluation, and the command neuclip-train."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """The requirements of a file, comments left out."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


setup(
    name="neuclip-training",
    version="0.1.0",
    description="Train CLIP models on a few GPUs with global contrastive objectives: NeuCLIP, OpenCLIP, SigLIP",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the NeuCLIP training authors",
    license="MIT",
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"training": ["model_configs/*.json"]},
    install_requires=requirements("requirements-training.txt"),
    extras_require={"quickstart": requirements("requirements-quickstart.txt")},
    entry_points={"console_scripts": ["neuclip-train = training.main:cli"]},
)
