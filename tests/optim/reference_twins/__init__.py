"""Slow twins of the rules: one matrix at a time, in the papers' own steps, in any dtype.

They share nothing with the fast code: tests compare the two.
"""
