"""Pictures of a run after an evaluation, as evaluation/main.py draws them: searches among its held-out pairs, its curves."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path

from evaluation.datasets import PairDataset
from evaluation.features import PairFeatures

GALLERY, CURVES = "gallery", "curves"


def draw_pictures(
    folder: Path, args: Namespace, epoch: int, pairs: PairDataset | None, features: PairFeatures | None
) -> dict[str, Path]:
    """Draw gallery.png (where there are held-out pairs) and curves.png into the run's folder.

    A picture that cannot be drawn costs itself and a line in the log, not the run.

    Args:
        args: the resolved command line (--name, --objective, --model).
        epoch: epochs completed.
        pairs, features: the validation pairs and what the model makes of them.

    Returns:
        name → file, of those that were drawn.
    """
    try:
        from evaluation.curves import plot_curves
    except ImportError:
        logging.warning("no pictures: matplotlib is not installed; pip install matplotlib")
        return {}
    drawn = {}
    try:
        plot_curves({args.name: folder}, folder / f"{CURVES}.png")
        drawn[CURVES] = folder / f"{CURVES}.png"
        if pairs is not None and features is not None:
            _draw_gallery(folder / f"{GALLERY}.png", args, epoch, pairs, features)
            drawn[GALLERY] = folder / f"{GALLERY}.png"
    except Exception as error:
        # A full disk, a font that is not there, a picture that was replaced since it was encoded: no reason to end a run.
        logging.exception("pictures after epoch %d cannot be drawn: %s", epoch, error)
    return drawn


def _draw_gallery(path: Path, args: Namespace, epoch: int, pairs: PairDataset, features: PairFeatures) -> None:
    """Captions spread over the held-out pairs, and the images nearest to each."""
    from evaluation.gallery_picture import draw_gallery
    from evaluation.held_out import read_queries
    from evaluation.search import nearest_images

    queries = read_queries(None, (), pairs)
    captions = pairs.captions()
    rows = [captions.index(query.text) for query in queries]
    hits = nearest_images(
        queries, features.text_features[rows], features.image_features, lambda i: (pairs.caption(i), pairs.concept(i))
    )
    subtitle = " · ".join((args.objective, f"epoch {epoch}", args.model))
    draw_gallery(path, args.name, subtitle, queries, hits, pairs.image, pairs.total)
