"""The book in one run: the chapters' own scripts, one after another, and a report. Stands above all chapters."""
