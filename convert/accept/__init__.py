"""Acceptance: does this program reproduce a recorded run of the release?"""
