"""Rows of results → tables, figures, pages. Imports neon; nothing in neon imports it."""
