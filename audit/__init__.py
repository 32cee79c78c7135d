"""The defects of two earlier studies, made again in miniature beside the check that catches each.

`python -m audit STUDY` and notebook 09 make it. The library does not import this package.
"""
