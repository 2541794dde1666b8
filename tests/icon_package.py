"""A small made-up npm package in the layout of @iconify/json, with a case for every rule of the study's builder."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

_COLOURS = ("amber", "azure", "black", "brown", "coral", "green", "ivory", "lilac", "mauve", "ochre", "olive", "plum")
_THINGS = ("anchor", "bottle", "candle", "engine", "fence", "guitar", "island", "ladder", "trumpet", "yacht")
CONCEPTS = [f"{colour}-{thing}" for colour in _COLOURS for thing in _THINGS]
ORDINARY_SETS = 14
DROPPED_SETS = {
    "gpl-set": {"license": {"title": "GPL 3.0", "spdx": "GPL-3.0"}},
    "nameless-license": {"license": {"title": "All rights reserved"}},
    "feather": {},
    "svg-spinners": {},
    "fluent-emoji": {"category": "Emoji"},
    "iconmind": {},
    "simple-marks": {"category": "Logos"},
    "file-types": {"category": "Programming"},
}
EMOJI_SETS = ("twemoji", "noto", "openmoji", "fluent-emoji-flat", "emojione", "noto-v1")
SIDE = 24


def body(*seed: str, colour: str = "currentColor") -> str:
    """Draw a few rectangles that depend on the words given."""
    chance = random.Random("/".join(seed))
    boxes = [
        [chance.randint(1, 20), chance.randint(1, 20), chance.randint(2, 9), chance.randint(2, 9)] for _ in range(6)
    ]
    path = "".join(f"M{x} {y}h{width}v{height}h-{width}z" for x, y, width, height in boxes)
    return f'<path fill="{colour}" d="{path}"/>'


def icon_set(names: list[str], *, seed: str, colour: str = "currentColor", **facts: object) -> dict:
    """Make the data of a set with one drawing of its own for every name."""
    icons = {name: {"body": body(seed, name, colour=colour)} for name in names}
    return {"icons": icons, "width": SIDE, "height": SIDE, **facts}


def _rules() -> dict:
    """Names with sizes, endings, numbers, brands, aliases; drawings that are equal, blank or broken."""
    sized = ["lamp-16", "lamp-24", "lamp-16-fill", "lamp-24-fill", "lamp-off-24"]
    numbered = ["vase", "vase2", "vase-03", "vase-two", "pier-4", "42-7"]
    data = icon_set(
        [*sized, *numbered, "harbour", "github-brand", "old-lamp"],
        seed="rules",
        suffixes={"16": "16px", "24": "24px", "16-fill": "16px Fill", "24-fill": "24px Fill"},
        categories={"Home": ["lamp-24", "vase"], "Light": ["lamp-24"], "Brand logos": ["harbour"]},
        aliases={
            "bulb-24": {"parent": "lamp-24"},
            "mirrored-24": {"parent": "lamp-24", "hFlip": True},
            "former-24": {"parent": "lamp-24", "hidden": True},
        },
    )
    icons = data["icons"]
    icons["old-lamp"]["hidden"] = True
    icons["blank"] = {"body": "<path d='M0 0h9v9z' fill='#fff'/>"}
    icons["broken"] = {"body": "<path d='M0 0h9v9z'"}
    icons["copied-anchor"] = {"body": body("set-00", "amber-anchor")}
    icons["wide"] = {"body": "<path d='M0 0h48v24H0z'/>", "width": 48, "height": 24}
    icons["shifted"] = {"body": "<path d='M100 100h12v24h-12z'/>", "left": 100, "top": 100}
    return data


def _endings() -> dict:
    bells = ["bell", "bell-outline", "bell-line", "bell-old-sharp"]
    return icon_set([*bells, "goal-line", "moon-duotone", "moon", "kite-filled-outline"], seed="endings")


def _emoji(prefix: str) -> dict:
    """Emoji of one maker: one that only it has a name for, and the same code points under names of its own."""
    names = {
        "1f600": "grinning-face",
        "1f3af": "bullseye",
        "26f3": "flag-in-hole",
        "1f44b": "waving-hand",
        "1f44b-1f3fb": "waving-hand-light-skin-tone",
        "1f1eb-1f1f7": "flag-for-flag-france",
        "1f1ef-1f1f5": "flag-for-japan",
    }
    if prefix == "emojione":
        names["1f3af"] = "direct-hit"
    if prefix in ("noto", "twemoji"):
        names["1f422"] = "turtle"
    inventions = {"openmoji": ["openmoji-nurse"], "noto-v1": ["blob"]}.get(prefix, [])
    colour = f"#{random.Random(prefix).randint(0x200000, 0xB00000):06x}"
    data = icon_set([*names.values(), *inventions], seed=prefix, colour=colour, chars=names)
    data["icons"]["waving-hand"]["hidden"] = prefix == "emojione"
    if prefix != "emojione":
        flags = [name for name in names.values() if name.startswith("flag-for")]
        others = [name for name in names.values() if name not in flags]
        data["categories"] = {"Faces": others, "Flags": flags, "Extras Openmoji": inventions}
    return data


def make_sets() -> tuple[dict[str, dict], dict[str, dict]]:
    """Make the package's content: facts about the sets, and their data, by prefix."""
    collections: dict[str, dict] = {}
    sets: dict[str, dict] = {}

    def add(prefix: str, data: dict, **facts: object) -> None:
        sets[prefix] = {"prefix": prefix, **data}
        collections[prefix] = {
            "name": prefix.replace("-", " ").title(),
            "total": len(data["icons"]),
            "author": {"name": f"Authors of {prefix}", "url": f"https://example.org/{prefix}"},
            "license": {"title": "MIT", "spdx": "MIT", "url": "https://example.org/mit"},
            "palette": False,
            **facts,
        }

    for index in range(ORDINARY_SETS):
        add(f"set-{index:02d}", icon_set(CONCEPTS, seed=f"set-{index:02d}"))
    licence = {"title": "CC BY 4.0", "spdx": "CC-BY-4.0"}
    add("iconoir", icon_set([*CONCEPTS, "only-here"], seed="iconoir"), license=licence)
    add("flat-color-icons", icon_set(CONCEPTS[:9], seed="flat", colour="#d04030"), palette=True)
    add("mdi", icon_set(CONCEPTS, seed="mdi"))
    add("mdi-light", icon_set(CONCEPTS, seed="mdi-light"))
    add("spellings", icon_set([f"{name.split('-')[1]}s-{name.split('-')[0]}" for name in CONCEPTS], seed="spellings"))
    add("rules", _rules())
    add("endings", _endings())
    begun = icon_set(
        ["baseline-cup", "outline-cup", "cup"], seed="begun", prefixes={"baseline": "Baseline", "outline": "Outline"}
    )
    add("begun", begun)
    add("circle-flags", icon_set(["fr", "jp", "zz"], seed="circle", colour="#2040a0"), palette=True)
    add("flag", icon_set(["fr-1x1", "fr-4x3"], seed="flag", colour="#2040a0"), palette=True)
    for prefix, facts in DROPPED_SETS.items():
        add(prefix, icon_set(["dropped-thing", "dropped-other"], seed=prefix), **facts)
    for prefix in EMOJI_SETS:
        licence = {"title": "CC BY-SA 4.0", "spdx": "CC-BY-SA-4.0" if prefix == "openmoji" else "MIT"}
        add(prefix, _emoji(prefix), license=licence, category="Emoji", palette=True)
    return collections, sets


def write_package(path: Path, collections: dict[str, dict], sets: dict[str, dict]) -> Path:
    """Write a tarball as npm packs it."""
    files = {f"package/json/{prefix}.json": data for prefix, data in sets.items()}
    files["package/package.json"] = {"name": "@iconify/json", "version": "0.0.1"}
    files["package/collections.json"] = collections
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            text = json.dumps(content).encode()
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
    return path
