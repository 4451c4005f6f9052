"""Solidity sources, their checked-in builds, and a local chain that has them. Imports nothing of Farebox's."""
