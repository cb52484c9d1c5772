"""What runs inside a hospital: ingest, training, evaluation and the answers a coordinator may get."""
