"""What k8s/monitoring/ holds, written by `make monitoring`: one source for rules and dashboards."""
