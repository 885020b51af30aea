"Everything about the package stands in settings.ini; this passes it on to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
name = cfg['lib_name']
extras = {k.removesuffix('_requirements'): v.split() for k, v in cfg.items() if k.endswith('_requirements')}

setup(
    name=name,
    version=cfg['version'],
    description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    keywords=cfg['keywords'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    license='MIT',
    url=cfg['git_url'],
    # The recipes and their tables travel with the package, so that an installed wheel runs them without a checkout.
    packages=[name, f'{name}._nbs'],
    package_dir={name: name, f'{name}._nbs': 'nbs'},
    package_data={name: ['shipped/*/*'], f'{name}._nbs': ['05_train.ipynb', '06_evaluate.ipynb', '07_soup.ipynb', '09_follow.ipynb',
                                                            'recipes/*.yaml']},
    include_package_data=False,
    python_requires='>='+cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f'{name}={name}._modidx:d']},
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Science/Research',
        'Natural Language :: English',
        *(f'Programming Language :: Python :: 3.{v}' for v in (10, 11, 12)),
    ],
    zip_safe=False,
)
