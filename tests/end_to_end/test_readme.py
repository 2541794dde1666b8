"""Every command in README.md: run here word for word where it is Python, or by the test that is named here."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from end_to_end.corpus import Corpus
from end_to_end.runs import ROOT
from evaluation import compare, gallery, normalizer_error
from evaluation import main as suite
from evaluation.comparison import commands as figures
from evaluation.datacomp.tasks import TASKS
from training import main as training
from training.data import index

# Regular expression of a command → the test that runs it, or what is like it but for the size.
ELSEWHERE = {
    r"\./scripts/quickstart\.sh.*": "tests/end_to_end/test_quickstart.py::test_from_data_to_gallery",
    r"\./scripts/test\.sh": "tests/end_to_end/test_readme.py::test_every_command_is_run_somewhere",
    r"pip install -r .*": "tests/end_to_end/test_quickstart.py::test_from_data_to_gallery",
    r"export PYTHONPATH=.*": "tests/end_to_end/test_launchers.py::test_published_command_on_two_ranks",
    r"torchrun .* src/training/main\.py FLAGS": "tests/end_to_end/test_launchers.py::test_published_command_on_two_ranks",
    r"torchrun .* src/evaluation/main\.py .*": "tests/evaluation/datacomp/test_command.py::"
    "test_one_rank_and_two_give_the_same_and_a_broken_set_stops_no_other",
    r"export MASTER_ADDR=.*|srun .*": "tests/end_to_end/faults/test_slurm.py::test_warned_job_requeues_itself",
    r"TRAIN_DATA=\S+ sbatch scripts/slurm/\S+": "tests/scripts/test_recipes.py::test_recipe_says_what_was_published",
    r"bash scripts/slurm/\S+ --dry-run": "tests/end_to_end/test_dry_run.py::test_a_recipe_without_slurm",
    r"TRAIN_DATA=\S+ \./scripts/torchrun\.sh .*": "tests/scripts/test_recipes.py::test_torchrun_runs_the_same_recipe",
    r"TRAIN_DATA=\S+ scripts/slurm/chain\.sh .*": "tests/scripts/test_recipes.py::"
    "test_chain_submits_its_links_one_after_the_other",
    r"python benchmarks/train_step\.py .*": "tests/benchmarks/test_train_step.py::test_parts_make_up_the_step",
    r"python benchmarks/vs_open_clip\.py .*": "tests/benchmarks/test_vs_open_clip.py::test_both_learn_the_same",
    r"python src/evaluation/download\.py .*": "tests/evaluation/datacomp/test_download.py::"
    "test_all_sets_into_the_layout_that_the_suite_reads",
    r"\./scripts/evaluate_datacomp\.sh .*": "tests/scripts/test_evaluate_scripts.py::"
    "test_public_code_gets_the_checkpoint_asked_for",
}
HERE: dict[str, Callable[[list[str]], int]] = {
    "src/training/main.py": lambda words: training.main([*words, "--dry-run"]),
    "training.data.index": index.main,
    "src/evaluation/main.py": suite.main,
    "src/evaluation/compare.py": compare.main,
    "src/evaluation/normalizer_error.py": normalizer_error.main,
    "src/evaluation/figures.py": figures.main,
    "src/evaluation/gallery.py": gallery.main,
}


def commands() -> Iterator[str]:
    """The lines of README.md's blocks of bash, without comments, continued ones as one."""
    for block in re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"(^|\s)#\s.*", "", line).strip()
            if command:
                yield command


def words_of(command: str) -> tuple[str, list[str]] | None:
    """(program, its arguments) of a command that is run here."""
    match shlex.split(command):
        case ["python", "-u" | "-m", program, *words] | ["python", program, *words] if program in HERE:
            return program, words
    return None


def test_every_command_is_run_somewhere() -> None:
    found = list(commands())
    assert len(found) > 20
    for command in found:
        places = [place for pattern, place in ELSEWHERE.items() if re.fullmatch(pattern, command)]
        assert len(places) + (words_of(command) is not None) == 1, command
    assert all(any(re.fullmatch(pattern, command) for command in found) for pattern in ELSEWHERE)


@pytest.mark.parametrize("place", sorted(set(ELSEWHERE.values())))
def test_the_tests_named_are_there(place: str) -> None:
    path, _, name = place.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_commands_word_for_word(
    train: Callable[..., int], corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder in which lies what they name, in small: shards, runs, evaluation sets."""
    monkeypatch.chdir(tmp_path)
    done = 0
    for command in commands():
        if (found := words_of(command)) is None:
            continue
        program, words = found
        if program == "training.data.index":
            lay_out(train, corpus, tmp_path)
        assert HERE[program](words) == 0, command
        done += 1
        if program == "src/evaluation/main.py":
            copy_runs(tmp_path / "logs")
    assert done >= len(HERE)
    for result in ("data/sizes.json", "tables/comparison.tex", "figures/curves.pdf", "logs/my-run/gallery.html"):
        assert (tmp_path / result).stat().st_size > 0, result


def lay_out(train: Callable[..., int], corpus: Corpus, folder: Path) -> None:
    """Twenty shards, a run of 24 epochs, and one of DataComp's sets."""
    (folder / "data").mkdir()
    for number in range(20):
        shutil.copy(corpus.folder / f"{number % 5:05d}.tar", folder / "data" / f"{number:05d}.tar")
    plan = ("--epochs", "24", "--batch-size", "16", "--train-num-samples", "16", "--warmup", "2", "--name", "my-run")
    method = ("--objective", "neuclip", "--npn_num_protos", "16", "--val-data", corpus.validation)
    assert train("--logs", str(folder / "logs"), "--train-data", corpus.train, *plan, *method) == 0
    shutil.copytree(corpus.zeroshot, folder / "data" / "datacomp" / TASKS["mnist"].folder)


def copy_runs(logs: Path) -> None:
    """The runs of other names, each with a seed of its own."""
    for seed, name in enumerate(("a", "b", "a-seed1", "a-seed2", "b-seed1", "b-seed2")):
        shutil.copytree(logs / "my-run", logs / name)
        params = (logs / name / "params.txt").read_text(encoding="utf-8")
        (logs / name / "params.txt").write_text(re.sub(r"(?m)^seed: .*", f"seed: {seed}", params), encoding="utf-8")
