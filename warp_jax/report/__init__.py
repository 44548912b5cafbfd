"""The report that a reader explores in a browser: its data as JSON, and the page that draws them."""
