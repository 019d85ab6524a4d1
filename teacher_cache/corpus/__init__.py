"""Documents by index, from files and Hub data sets, as the tasks read them."""
