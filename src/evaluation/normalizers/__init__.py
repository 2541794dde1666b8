"""How far a method's log-normalizers are from those of the whole data set."""
