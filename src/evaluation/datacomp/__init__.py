"""The 40 evaluation sets of DataComp, read from local folders, with the numbers of the public evaluation code."""
