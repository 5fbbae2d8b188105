"""Conversion between named arrays and Flax variables: key conventions, recognition, conversion, loading, verification."""
