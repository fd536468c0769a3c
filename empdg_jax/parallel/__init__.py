"""Data parallelism: `devices` within a host, `hosts` between them."""
