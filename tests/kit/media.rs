//! Small files that are what they say: a picture, a sound and a film, and data URIs of them.

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{GeneralPurpose, GeneralPurposeConfig};

/// A grey picture in PNG. Its data are not compressed (RFC 1951, section 3.2.4), so it has about as many
/// bytes as pixels.
pub fn png(width: u32, height: u32) -> Vec<u8> {
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[8, 0, 0, 0, 0]].concat();
    png_chunk(&mut file, b"IHDR", &header);
    // Each line begins with its filter, 0.
    let line = |y: u32| [0].into_iter().chain((0..width).map(move |x| (x ^ y) as u8));
    let pixels: Vec<u8> = (0..height).flat_map(line).collect();
    png_chunk(&mut file, b"IDAT", &stored(&pixels));
    png_chunk(&mut file, b"IEND", b"");
    file
}

fn png_chunk(file: &mut Vec<u8>, kind: &[u8; 4], data: &[u8]) {
    let length = u32::try_from(data.len()).expect("a small chunk");
    file.extend_from_slice(&length.to_be_bytes());
    let named = [&kind[..], data].concat();
    file.extend_from_slice(&named);
    file.extend_from_slice(&crc32(&named).to_be_bytes());
}

/// A zlib stream with blocks that are stored as they are.
fn stored(data: &[u8]) -> Vec<u8> {
    let mut stream = vec![0x78, 0x01];
    let count = data.chunks(0xffff).len();
    for (number, block) in data.chunks(0xffff).enumerate() {
        let length = block.len() as u16;
        stream.push(u8::from(number + 1 == count));
        stream.extend_from_slice(&length.to_le_bytes());
        stream.extend_from_slice(&(!length).to_le_bytes());
        stream.extend_from_slice(block);
    }
    let (mut a, mut b) = (1_u32, 0_u32);
    for byte in data {
        a = (a + u32::from(*byte)) % 65_521;
        b = (b + a) % 65_521;
    }
    stream.extend_from_slice(&(b << 16 | a).to_be_bytes());
    stream
}

fn crc32(data: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    !data.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

/// A tenth of a second of a tone, in WAV.
pub fn wav() -> Vec<u8> {
    const RATE: u32 = 16_000;
    let samples: Vec<u8> = (0..RATE / 10).flat_map(|at| ((at % 64) as i16 * 256).to_le_bytes()).collect();
    let length = samples.len() as u32;
    let mut file = [b"RIFF", &(36 + length).to_le_bytes()[..], b"WAVEfmt ", &16_u32.to_le_bytes()].concat();
    // PCM, one channel, 16 bits.
    for number in [1_u16, 1] {
        file.extend_from_slice(&number.to_le_bytes());
    }
    file.extend_from_slice(&[RATE.to_le_bytes(), (2 * RATE).to_le_bytes()].concat());
    file.extend_from_slice(&[2_u16.to_le_bytes(), 16_u16.to_le_bytes()].concat());
    [file, [b"data", &length.to_le_bytes()[..]].concat(), samples].concat()
}

/// An MP4 file without a track: its type, the head of a film, and data.
pub fn mp4() -> Vec<u8> {
    let boxed = |kind: &[u8; 4], data: &[u8]| {
        let length = u32::try_from(8 + data.len()).expect("a small box");
        [&length.to_be_bytes()[..], kind, data].concat()
    };
    let mut head = [0; 100];
    // 1,000 units a second, played once at full speed and volume, the next track is 1.
    head[14] = 0x03;
    head[15] = 0xe8;
    head[21] = 0x01;
    head[24] = 0x01;
    head[99] = 1;
    [
        boxed(b"ftyp", b"isom\0\0\x02\0isommp41"),
        boxed(b"moov", &boxed(b"mvhd", &head)),
        boxed(b"mdat", &[7; 64]),
    ]
    .concat()
}

pub fn base64(bytes: &[u8]) -> String {
    GeneralPurpose::new(&STANDARD, GeneralPurposeConfig::new()).encode(bytes)
}

pub fn data_uri(kind: &str, bytes: &[u8]) -> String {
    format!("data:{kind};base64,{}", base64(bytes))
}
