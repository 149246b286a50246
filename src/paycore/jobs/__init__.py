"""Work that nobody calls for: it sends back what is owed. Each job can be run once by hand and at any time again."""
