//! Whether a volume still holds what an import that was cut off left there: by samples, for to compare all would take
//! as long as to copy it.

use super::disk::{Disk, DiskError, Runs};

/// Parts of each side of the mark that are looked at.
const SLOTS: u64 = 64;

/// Bytes compared at each place.
const SAMPLE_BYTES: u64 = 4096;

/// Where a volume is not what an import that came to `sent` left there: before it the image's data, behind it these
/// or zeroes, sector by sector. Of each slot the start, the end, and the first data of either are looked at.
/// None: nowhere there.
///
/// # Errors
/// If one of them cannot be read.
pub fn difference(
    image: &mut Disk,
    volume: &mut Disk,
    sent: u64,
) -> Result<Option<u64>, DiskError> {
    let size = volume.size();
    let sent = sent.min(size);
    for (start, end) in [(0, sent), (sent, size)] {
        let slot = ((end - start) / SLOTS).next_multiple_of(SAMPLE_BYTES);
        let slot = slot.max(SAMPLE_BYTES);
        let mut at = start;
        while at < end {
            let slot_end = (at + slot).min(end);
            let in_image = Runs::new(at, slot_end).next_data(image)?;
            let in_volume = Runs::new(at, slot_end).next_data(volume)?;
            let last = slot_end.saturating_sub(SAMPLE_BYTES).max(at);
            let data = in_image.iter().chain(&in_volume).map(|(place, _)| *place);
            for place in [at, last].into_iter().chain(data) {
                let place = place - place % SAMPLE_BYTES;
                let found = sector_that_differs(image, volume, sent, place)?;
                if found.is_some() {
                    return Ok(found);
                }
            }
            at = slot_end;
        }
    }
    Ok(None)
}

fn sector_that_differs(
    image: &mut Disk,
    volume: &mut Disk,
    sent: u64,
    place: u64,
) -> Result<Option<u64>, DiskError> {
    let len = SAMPLE_BYTES.min(volume.size() - place);
    let len = usize::try_from(len).expect("a sample is short");
    let (mut ours, mut theirs) = (vec![0; len], vec![0; len]);
    image.read_at(place, &mut ours)?;
    volume.read_at(place, &mut theirs)?;
    let sectors = ours.chunks(512).zip(theirs.chunks(512));
    let differing = (place..).step_by(512).zip(sectors).find(|(sector, pair)| {
        let untouched = *sector >= sent && pair.1.iter().all(|byte| *byte == 0);
        pair.0 != pair.1 && !untouched
    });
    Ok(differing.map(|(sector, _)| sector))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;
    use std::sync::Arc;

    use super::*;

    const SIZE: u64 = 8 << 20;
    const SENT: u64 = 3 << 20;

    fn disk(content: &[(u64, u8)]) -> (Arc<File>, Disk) {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(SIZE).unwrap();
        for &(at, byte) in content {
            file.write_all_at(&[byte; 4096], at).unwrap();
        }
        let disk = Disk::File {
            file: Arc::clone(&file),
            size: SIZE,
        };
        (file, disk)
    }

    #[test]
    fn volume_as_it_was_left_does_not_differ() {
        let content = [(0, 1), (SENT - 4096, 2), (SENT, 3), (SIZE - 4096, 4)];
        let (_, mut image) = disk(&content);
        for written in [&content[..2], &content[..3], &content] {
            let (volume, mut left) = disk(written);
            assert_eq!(difference(&mut image, &mut left, SENT).unwrap(), None);
            // A write that was cut off, behind the mark.
            volume.write_all_at(&[0; 512], SENT).unwrap();
            assert_eq!(difference(&mut image, &mut left, SENT).unwrap(), None);
        }
        let (_, mut all) = disk(&content);
        assert_eq!(difference(&mut image, &mut all, SIZE).unwrap(), None);
    }

    #[test]
    fn volume_that_lacks_or_has_something_else_differs_there() {
        let content = [(0, 1), (SENT - 4096, 2), (SIZE - 4096, 4)];
        let (_, mut image) = disk(&content);
        for (at, byte) in [
            (0, 0),
            (SENT - 4096, 0),
            (SENT - 4096, 9),
            (SENT, 9),
            (SIZE - 4096, 9),
            (5 << 20, 9),
        ] {
            let (volume, mut other) = disk(&content);
            volume.write_all_at(&[byte; 4096], at).unwrap();
            let found = difference(&mut image, &mut other, SENT).unwrap();
            assert_eq!(found, Some(at), "{byte} at {at}");
        }
    }
}
