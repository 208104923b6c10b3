"""The tables and figures of the five sources, one script each, named by author, year and topic (see docs/papers.md).

``kadagala_report`` is undated; the keys in references.bib are kadagala_hoag_report, kadagala_thesis_2025,
ehrhardt_slides_2025, bogensperger_piggyback_maid_2024 and villacis_slides_2025.
"""
