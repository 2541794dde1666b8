"""Builder of the quickstart data: drawings from Python packages, rendered and captioned as image-text pairs.

`sources` lists the drawings, `names` says which of them are held out, `rendering` makes the pixels, `captions` the
words, `dataset` puts the splits together and `queries` picks the words for a demonstration.
"""

# Raise it with every change that alters the files, so that finished data of an older builder is rebuilt.
BUILDER_VERSION = 2
