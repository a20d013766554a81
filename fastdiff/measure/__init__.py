"""Measuring what sparse attention costs and gains: time (timing), fidelity (quality), the record of both (report)."""
