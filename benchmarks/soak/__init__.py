"""Faults and odd input against a server of its own: is every picture the same, and does everybody get an answer?"""
