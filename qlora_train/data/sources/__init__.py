"""Where rows come from: files, folders and hub data sets, each read into one mapping of columns a row."""
