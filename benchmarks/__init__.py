"""Measurements, side by side in one run; results/ holds what they wrote, with the machine and the command."""
