"""Work on a torch model: select, measure, judge and smooth its weight matrices."""
