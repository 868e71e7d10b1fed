"""Data sets: the digits, Boston Housing, splitting, and data sets that lie on several workers."""
