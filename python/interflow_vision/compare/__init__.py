"""Studies: arms x seeds x data sets x networks from a YAML file, trained side by side, and the page that is made of their results.

plan      the YAML file, and the runs that it asks for
datasets  data modules by the names that a plan uses
run       one training: resumable, its result one JSON file
measures  what is measured in it
results   the JSON files; the learning rate of each arm, chosen on validation
workers   runs in processes side by side
statistics, claims, tables, plots, page   from JSON files to Markdown and HTML

Plan, results, statistics and page need no training: a page is made anew from committed JSON files alone.
"""
