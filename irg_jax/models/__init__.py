"""The network: maths without I/O, written for one device."""
