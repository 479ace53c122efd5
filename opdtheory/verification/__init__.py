"""`opdtheory verify` and `table`: the theorems run, the shipped estimators audited, and the pages of both."""
