"""One adapter, one file: written whole, read as data, and compared with the base at hand."""
