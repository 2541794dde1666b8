"""What the builders of data sets share: drawings in, folders of image-text shards out.

`flags` are those that every builder has, `folder` puts a finished build in place whole, `names` says what makes two
names one concept, `rendering` makes pixels of SVG text, `layouts` and `shards` write the files.
"""


class BuildError(Exception):
    """A mistake or a lack that the user can mend; the message is one line with the remedy."""
