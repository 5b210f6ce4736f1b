"""Comparisons: what is compared, on what, how often; run into a ledger. The library's own are the files here."""
