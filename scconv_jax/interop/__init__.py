"""Named arrays to variables and back: key conventions, recognition, conversion, loading, verification."""
