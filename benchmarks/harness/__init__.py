"""How everything here is measured: sizes and inputs, competitors, checks, timing, device probes."""
