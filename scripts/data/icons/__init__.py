"""Builder of the study's data: icons of about 160 sets from one npm package, rendered as image-text pairs.

`download` fetches the package and `package` reads it; `selection` says which sets and icons are used, `names` what
their names mean, `emoji` does the same for emoji, `captions` writes the words; `splits` says what is held out,
`catalogue` puts this together as a list of icons, `limit` takes a part of it; `rendering` makes the pixels,
`duplicates` compares them, `dataset` writes the splits and `manifest` counts.
"""

# Raise it with every change that alters the files, so that finished data of an older builder is rebuilt.
BUILDER_VERSION = 1
