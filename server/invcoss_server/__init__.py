"""What the consortium operator runs: the relay, acceptance, inversion, the pool, state and the report."""
