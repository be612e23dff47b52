"""From saved JSON to tables, verdicts and charts."""
