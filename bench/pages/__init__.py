"""How results are shown: loaded, put into tables and charts, written as Markdown, HTML and pictures. Nothing here measures."""
