"""Models behind one interface: see base.py."""
