"""A trained model shows what it can do: `make demo`, or `python -m examples.demo`.

People whom training never saw say sentences that it never heard, in four emotions.
Judges that share nothing with the model score the videos, and a page shows them beside
the truth. `clips` makes the videos, `scores` judges them, `files` writes them, and
`page` is what one looks at.
"""
