"""The wires that expert weights travel on."""
