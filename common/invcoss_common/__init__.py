"""What the coordinator and the sites share: plan, model, weights, statistics and the wire records."""

__version__ = "0.1.0"
