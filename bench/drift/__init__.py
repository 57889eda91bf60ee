"""`python -m bench.drift --data DIR`: how long monitors run without drift, and how soon they find it, on real text."""
