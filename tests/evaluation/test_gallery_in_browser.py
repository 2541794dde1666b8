"""The page in a real browser: it opens from a file with the network off, shows all images, and fits any window."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.gallery import main

from .browser import find_browser, opened_browser
from .conftest import image_bytes
from .looks import add_prototypes, write_harmful_pairs

BROWSER = find_browser()

# Every image of the sprite is decoded by itself; one without pixels would have no width.
DECODED = """
Promise.all([...document.querySelectorAll("image")].map(async (element) => {
  const image = new Image();
  image.src = element.getAttribute("href");
  await image.decode();
  return image.naturalWidth;
}))
"""
SHOWN = """
[...document.querySelectorAll("svg.pic")].map((picture) => {
  const box = picture.getBoundingClientRect(), drawn = picture.querySelector("use").getBBox();
  return Math.min(box.width, box.height, drawn.width, drawn.height);
})
"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
def test_in_a_browser(make_run: Callable[..., Path], tmp_path: Path) -> None:
    assert BROWSER is not None
    run, out, photo = make_run("run", epochs=(1,)), tmp_path / "page.html", tmp_path / "photo.jpg"
    write_harmful_pairs(tmp_path / "0.tar")
    add_prototypes(run / "checkpoints" / "epoch_1.pt")
    photo.write_bytes(image_bytes(3, 200, "JPEG"))
    flags = f"--train_output_dir {run} --pairs {tmp_path}/0.tar --images {photo} --random 12 --workers 0 --out {out}"
    assert main(flags.split()) == 0
    with opened_browser(BROWSER, tmp_path / "profile") as page:
        for width, scheme, background in ((1280, "light", "rgb(246, 247, 249)"), (360, "dark", "rgb(15, 17, 21)")):
            page.resize(width, 800)
            page.prefer(scheme)
            page.open(out)
            assert page.evaluate("document.title") == "run: a look inside"  # no caption has changed it
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == background
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            assert page.evaluate("document.querySelectorAll('script, img, iframe').length") == 0
            shown = page.evaluate(SHOWN)
            assert len(shown) > 2 * 12
            assert min(shown) >= 30
            widths = page.evaluate(DECODED)
            assert len(widths) == 13
            assert min(widths) > 0
        outside = [url for url in page.requests if not url.startswith("data:image/webp;")]
        assert outside == [out.as_uri()] * 2
        assert page.complaints == []
        # The policy holds: what a page may not load or run is refused, and noticed.
        ran = "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s);"
        page.evaluate(f"{ran} window.ran === undefined")
        assert page.evaluate("window.ran === undefined")
        assert any("Content Security Policy" in complaint for complaint in page.complaints)
