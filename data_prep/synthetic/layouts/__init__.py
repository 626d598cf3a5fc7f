"""Writers of raw trees exactly as datasets are published; the file name is the name of the layout.

A layout module has:

- ``samples(category, counts)``: every sample of a category, :class:`~data_prep.synthetic.shots.Sample`;
- ``prepare(root, category, size, seed)``: makes the folders and writes what belongs to a category as a whole;
- ``write(root, sample, size, plane, seed)``: draws one sample and writes its files.

and, where the dataset needs them,

- ``finish(root, samples)``: writes what belongs to the whole tree, after all samples;
- ``archives(root)``: (archive, folder below ``root`` or "" for everything) pairs, as the dataset is published.

A layout with options of its own, the field of SynthConfig that has its name, takes them as the last argument of
``prepare`` and ``write``. It may have ``objects(options)``, which checks them and names further categories;
``DEFAULTS``, values of SynthConfig's fields that are not given; and ``CHUNK``, the samples in one task of a worker.
"""
