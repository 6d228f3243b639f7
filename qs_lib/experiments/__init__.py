"""Arms x seeds behind the claims: ``python -m qs_lib.experiments NAME`` makes the rows that are missing."""
