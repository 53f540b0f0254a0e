"""Small ICC profiles of colour spaces that pictures come in (ICC.1:2001-04)."""
import struct


def fixed(*values):
    """s15Fixed16Numbers."""
    return struct.pack(f'>{len(values)}i', *(round(value * 65536) for value in values))


def xyz(*values):
    return b'XYZ \0\0\0\0' + fixed(*values)


def gamma(value):
    return b'curv\0\0\0\0' + struct.pack('>IH', 1, round(value * 256))


WHITE = .9642, 1, .8249                                                                 # D50
SRGB_CURVE = b'para\0\0\0\0' + struct.pack('>HH', 3, 0) + fixed(2.4, 1 / 1.055, .055 / 1.055, 1 / 12.92, .04045)


def profile(space, name, kind=b'mntr', connection=b'XYZ ', **tags):
    """The bytes of a profile with these tags."""
    name = b'desc\0\0\0\0' + struct.pack('>I', len(name) + 1) + name.encode() + bytes(79)
    tags = {'desc': name, 'wtpt': xyz(*WHITE), **tags}
    table, data = struct.pack('>I', len(tags)), b''
    for tag, content in tags.items():
        table += tag.encode() + struct.pack('>II', 132 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    header = struct.pack('>I4xI4s4s4s12x4s28x', 128 + len(table + data), 0x02400000, kind, space, connection, b'acsp')
    return header + fixed(*WHITE) + bytes(48) + table + data


def rgb(name, curve, *primaries):
    return profile(b'RGB ', name, **{f'{colour}XYZ': xyz(*primary) for colour, primary in zip('rgb', primaries)},
                   **{f'{colour}TRC': curve for colour in 'rgb'})


def ink(c, m, y, k):
    """Lab, in bytes, of CMYK that are 0 or 1: neutral and lighter the less ink there is."""
    return round(255 * (1 - k) * (1 - (c + m + y) / 3)), 128, 128


SRGB = rgb('sRGB', SRGB_CURVE, (.4361, .2225, .0139), (.3851, .7169, .0971), (.1431, .0606, .7141))
P3 = rgb('Display P3', SRGB_CURVE, (.5151, .2412, -.0011), (.2920, .6922, .0419), (.1571, .0666, .7841))
ADOBE = rgb('Adobe RGB (1998)', gamma(563 / 256), (.6097, .3111, .0195), (.2053, .6257, .0609), (.1492, .0632, .7446))
PROPHOTO = rgb('ProPhoto', gamma(1.8), (.7977, .2880, 0), (.1352, .7119, 0), (.0313, .0001, .8249))
LINEAR_GREY = profile(b'GRAY', 'linear', kTRC=gamma(1))
BYTES = bytes(range(256))
INKS = bytes(value for n in range(16) for value in ink(*(n >> k & 1 for k in (3, 2, 1, 0))))
CMYK = profile(b'CMYK', 'ink', b'prtr', b'Lab ', A2B0=b'mft1\0\0\0\0\4\3\2\0' + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) +
               4 * BYTES + INKS + 3 * BYTES)
