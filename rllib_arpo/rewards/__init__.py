"""Rewards: functions from a finished trajectory to named numbers."""
