"""Figures and tables over several runs, from the files that training and evaluation left in their folders."""
