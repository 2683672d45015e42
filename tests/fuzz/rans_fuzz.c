/* Fuzz target of the residual codec: any params and payload, every kernel, under AddressSanitizer and UBSan.
 *
 * Input: format, flags, output length (2 bytes), params length (2 bytes), params, payload. All kernels must agree, on
 * failure as on bytes; what params can be parsed must encode the input itself and give it back. See build.sh.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../hydrafs/native/rans_core.h"

static const rans_format formats[] = {{2, 1, 10}, {2, 1, 7}, {4, 1, 23}, {1, 1, 3}, {1, 1, 2}, {1, 0, 0},
                                      {2, 0, 0},  {4, 0, 0}, {8, 0, 0},  {8, 1, 52}};
static const char *const names[] = {"portable", "avx2", "avx512"};

/* Exactly as large as it says, so that a byte too far is seen. */
static uint8_t *copy(const uint8_t *data, size_t nbytes)
{
    uint8_t *made = malloc(nbytes ? nbytes : 1);
    if (!made)
        abort();
    if (nbytes)
        memcpy(made, data, nbytes);
    return made;
}

static void check(int good)
{
    if (!good)
        abort();
}

static void try_decode(const rans_models *models, rans_format f, const uint8_t *prediction, const uint8_t *payload,
                       size_t payload_nbytes, size_t nbytes)
{
    uint8_t *first = NULL;
    rans_status expected = RANS_OK;
    for (size_t i = 0; i < 3; i++) {
        rans_kernel kernel;
        if (rans_find_kernel(names[i], &kernel))
            continue;
        uint8_t *out = calloc(nbytes ? nbytes : 1, 1);
        const rans_status status = rans_decode(models, kernel, f, prediction, payload, payload_nbytes, out, nbytes);
        if (!first) {
            first = out;
            expected = status;
            continue;
        }
        check(status == expected && (status != RANS_OK || !memcmp(first, out, nbytes)));
        free(out);
    }
    free(first);
}

static void round_trip(rans_models *models, rans_format f, const uint8_t *prediction, const uint8_t *target,
                       size_t nbytes)
{
    uint8_t *payload[3] = {NULL, NULL, NULL};
    size_t length[3];
    check(rans_prepare(models->residual) == RANS_OK && rans_prepare(models->plain) == RANS_OK);
    for (size_t i = 0; i < 3; i++) {
        rans_kernel kernel;
        if (rans_find_kernel(names[i], &kernel))
            continue;
        const rans_status status = rans_encode(models, kernel, f, prediction, target, nbytes, &payload[i], &length[i]);
        if (status == RANS_NO_MODEL)
            return;
        check(status == RANS_OK && length[i] <= nbytes + 1 && length[i] == length[0]);
        check(!memcmp(payload[i], payload[0], length[0]));
        uint8_t *out = malloc(nbytes ? nbytes : 1);
        check(rans_decode(models, kernel, f, prediction, payload[i], length[i], out, nbytes) == RANS_OK);
        check(!memcmp(out, target, nbytes));
        free(out);
    }
    for (size_t i = 0; i < 3; i++)
        free(payload[i]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 6)
        return 0;
    const rans_format f = formats[data[0] % (sizeof formats / sizeof *formats)];
    const unsigned flags = data[1];
    const size_t nbytes = (size_t)data[2] << 8 | data[3];
    size_t params_nbytes = (size_t)data[4] << 8 | data[5];
    data += 6;
    size -= 6;
    if (params_nbytes > size)
        params_nbytes = size;
    uint8_t *params = copy(data, params_nbytes), *payload = copy(data + params_nbytes, size - params_nbytes);
    const size_t payload_nbytes = size - params_nbytes;
    uint8_t *prediction = calloc(nbytes ? nbytes : 1, 1), *target = calloc(nbytes ? nbytes : 1, 1);
    for (size_t i = 0; size && i < nbytes; i++) {
        prediction[i] = (uint8_t)(data[i % size] + i / size);
        target[i] = (uint8_t)(prediction[i] + (flags & 2 ? payload_nbytes ? payload[i % payload_nbytes] : 1 : i % 7 == 0));
    }
    const uint8_t *known = flags & 1 ? prediction : NULL;
    rans_models models;
    if (rans_parse(params, params_nbytes, &models) == RANS_OK) {
        try_decode(&models, f, known, payload, payload_nbytes, nbytes);
        round_trip(&models, f, known, target, nbytes);
        rans_free(&models);
    }
    if (flags & 4 && f.nbytes < 8) {
        rans_samples samples;
        uint8_t *made = NULL;
        size_t made_nbytes = 0;
        rans_kernel kernel;
        memset(&samples, 0, sizeof samples);
        samples.format = f;
        samples.plain = !known;
        check(rans_sample(&samples, known, target, nbytes) == RANS_OK);
        for (size_t i = 0; i < 3; i++) {
            uint8_t *again = NULL;
            size_t again_nbytes = 0;
            if (rans_find_kernel(names[i], &kernel))
                continue;
            check(rans_train(&samples, kernel, &again, &again_nbytes) == RANS_OK);
            check(!i || (again_nbytes == made_nbytes && (!made || !memcmp(again, made, made_nbytes))));
            free(i ? again : NULL);
            if (!i) {
                made = again;
                made_nbytes = again_nbytes;
            }
        }
        if (made_nbytes) {
            check(rans_parse(made, made_nbytes, &models) == RANS_OK);
            round_trip(&models, f, known, target, nbytes);
            rans_free(&models);
        }
        free(made);
        free(samples.target);
        free(samples.prediction);
    }
    free(params);
    free(payload);
    free(prediction);
    free(target);
    return 0;
}

#ifdef RANS_FUZZ_MAIN /* without libFuzzer: runs the files that it is given (AFL++: @@) */
int main(int argc, char **argv)
{
    static uint8_t data[1 << 20];
    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        if (!file)
            return 1;
        const size_t size = fread(data, 1, sizeof data, file);
        fclose(file);
        LLVMFuzzerTestOneInput(data, size);
    }
    return 0;
}
#endif
