"""One policy a file, `plan(snapshot) -> RoundPlan`; `registry` knows their names."""
